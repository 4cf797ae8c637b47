"""The circuits, in Amaranth HDL. Nothing outside this folder needs that package."""
