"""The circuits, in Amaranth HDL. Nothing outside this folder needs that package."""

from fourbit.hardware.units._bits import Stages as Stages
from fourbit.hardware.units._build import build as build
