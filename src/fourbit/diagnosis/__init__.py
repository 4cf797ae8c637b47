"""What is wrong with a run, in sentences, from the numbers that runs record.

    History    the numbers: lines of metrics.jsonl, added as they come
    RULES      a table: what is looked for, the sentence that says so, what mends it, and why the threshold is where it is
    examine    the rules on a history: findings
    Warner     the same while the run goes on: each kind is said once

`fourbit.report` reads folders and asks here; `fourbit train` tells its lines to a Warner; `fourbit.Watch` is for loops of one's
own. Neither torch nor files are needed for a history.
"""

from fourbit.diagnosis._findings import Finding as Finding
from fourbit.diagnosis._findings import examine as examine
from fourbit.diagnosis._history import History as History
from fourbit.diagnosis._history import number as number
from fourbit.diagnosis._rules import RULES as RULES
from fourbit.diagnosis._rules import Rule as Rule
from fourbit.diagnosis._seeds import OUTLIER as OUTLIER
from fourbit.diagnosis._seeds import outlier as outlier
from fourbit.diagnosis._warner import Warner as Warner
