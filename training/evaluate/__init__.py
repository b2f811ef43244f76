"""`causerie evaluate`: measures of a model, beside the one it would replace, and the gate between them."""
