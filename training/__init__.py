"""The training stages. Each one reads a model directory and writes one."""
