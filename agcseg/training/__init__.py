"""What a run is while it trains: `run` is the door, read from top to bottom."""
