"""`loraplex adapters`: what can be done with adapters from the command line."""
