"""The request: who asks, which adapter version they mean, is it resident, generate, stream. Imports `adapters`."""
