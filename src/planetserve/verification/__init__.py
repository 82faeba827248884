"""What a server can be held to: digests of what crossed its edges, and signed receipts of them."""
