"""The serving half of Causerie: model, engine, gateway and the `causerie` command."""
