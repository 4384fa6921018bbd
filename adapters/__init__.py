"""The adapter as an artifact: train it, check it, store it, version it. Runs with no server and knows no HTTP."""
