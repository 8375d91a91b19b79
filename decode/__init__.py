"""The decode service: owns a request from its admission to its last token."""
