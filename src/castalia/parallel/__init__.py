"""Everything that knows a rank or names a device."""
