"""The embedded default: a small model, and the data set that it trains on, made by the project itself."""
