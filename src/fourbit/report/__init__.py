"""Reports about training runs: one page with tables and figures, made from run folders alone.

>>> from fourbit.report import summarize, markdown_table, write_report  # doctest: +SKIP
>>> print(markdown_table(summarize(["runs/compare"])))                  # doctest: +SKIP
>>> write_report(["runs/compare"])                                      # doctest: +SKIP
PosixPath('runs/compare/report/index.html')

The package reads files and imports neither the trainer nor torch, so that a page can be made on any machine, from
runs that are still going, or that someone else did.
"""

from fourbit.report._diagnose import Diagnosis as Diagnosis
from fourbit.report._diagnose import diagnose as diagnose
from fourbit.report._html import write_report as write_report
from fourbit.report._number_line import draw_number_line as draw_number_line
from fourbit.report._page import Chapter as Chapter
from fourbit.report._page import Grid as Grid
from fourbit.report._page import Text as Text
from fourbit.report._page import write_page as write_page
from fourbit.report._stats import FinalResult as FinalResult
from fourbit.report._stats import RecipeSummary as RecipeSummary
from fourbit.report._stats import final_results as final_results
from fourbit.report._stats import summarize as summarize
from fourbit.report._style import DPI as DPI
from fourbit.report._style import PALETTE as PALETTE
from fourbit.report._style import REFERENCE_COLOR as REFERENCE_COLOR
from fourbit.report._style import Plot as Plot
from fourbit.report._style import legend as legend
from fourbit.report._style import panels as panels
from fourbit.report._style import step_axis as step_axis
from fourbit.report._style import style as style
from fourbit.report._tables import markdown_table as markdown_table
from fourbit.report._watch import watch as watch
from fourbit.report._watch import watching as watching
