"""How a launch starts its processes, hears of signals, watches its peers and ends."""
