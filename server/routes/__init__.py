"""The HTTP surface: one module a noun, handlers that only translate. Each router names the scope it needs."""
