"""Where an adapter may be fetched from: the hub, object stores, the web, directories of this machine."""
