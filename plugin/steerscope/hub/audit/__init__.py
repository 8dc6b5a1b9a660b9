"""Who changed steering, and what was steered: a log that can only grow, each line chained."""
