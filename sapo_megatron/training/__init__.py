"""The loop, what it trains with and what it observes."""
