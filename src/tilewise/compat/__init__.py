"""Other libraries' interfaces to attention, computed by tilewise."""
