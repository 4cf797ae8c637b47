"""Recipes as data: rules that give each layer its six operands, and the functions that apply, explain and undo them."""

from fourbit.recipes._convert import convert as convert
from fourbit.recipes._convert import restore as restore
from fourbit.recipes._explain import GEMMS as GEMMS
from fourbit.recipes._explain import Explanation as Explanation
from fourbit.recipes._explain import LayerExplanation as LayerExplanation
from fourbit.recipes._explain import explain as explain
from fourbit.recipes._groups import param_groups as param_groups
from fourbit.recipes._loss_scale import LossScaler as LossScaler
from fourbit.recipes._loss_scale import loss_scaler as loss_scaler
from fourbit.recipes._memory import LayerMemory as LayerMemory
from fourbit.recipes._memory import MemoryReport as MemoryReport
from fourbit.recipes._memory import memory_report as memory_report
from fourbit.recipes._rule import Recipe as Recipe
from fourbit.recipes._rule import Rule as Rule
from fourbit.recipes._rule import Selector as Selector
from fourbit.recipes._rule import depthwise as depthwise
from fourbit.recipes._rule import first as first
from fourbit.recipes._rule import kernel_size as kernel_size
from fourbit.recipes._rule import last as last
from fourbit.recipes._rule import name as name
from fourbit.recipes._rule import widens as widens
from fourbit.recipes.catalog import CATALOG as CATALOG
from fourbit.recipes.catalog import get as get
from fourbit.recipes.catalog import names as names
