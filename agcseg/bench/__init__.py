"""Speed and memory of training steps, measured side by side: a step, what is measured of it, tables and pages."""
