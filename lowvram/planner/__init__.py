"""From a budget of memory to a proven plan: a trace, an allocator's replay, a card's speed, and a search."""
