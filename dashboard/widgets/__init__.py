"""The typed widgets of ``trex-dash``: each draws a view, none of them changes it."""
