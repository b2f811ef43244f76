"""A model's layers one after another: read, quantised on what the quantised model computes, written."""
