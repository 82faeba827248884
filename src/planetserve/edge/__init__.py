"""The two ends of an edge of the ring: with them the client and all hops exchange steps."""
