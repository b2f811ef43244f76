"""Set-up for scripts/serve and scripts/test: from a bare Python to a virtual environment with Causerie in it.

Uses the standard library only, and imports nothing of the product.
"""
