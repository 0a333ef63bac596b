"""What must hold when things die: after a fault of any kind, the same command ends with the same bytes."""
