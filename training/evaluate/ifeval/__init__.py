"""IFEval's 25 checkable instructions (arXiv:2311.07911), from their published descriptions."""
