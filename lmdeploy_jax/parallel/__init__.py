"""Devices as a mesh, and which axis of a weight goes over which axis of it."""
