"""How reports call findings, as JSON tables that `vlm3d_ext.text.finding_patterns` reads."""
