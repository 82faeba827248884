"""An HTTP server with OpenAI's API in front of a swarm, and the client core that it runs on."""
