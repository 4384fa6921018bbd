"""FLOW merge: plan → apply → verify → export. An adapter and its base become one model. Runs with no server."""
