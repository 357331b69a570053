"""Looking at what strategies do. Nothing here is imported by the core.

`tokenprune.analysis.overlay` draws which patches a plan keeps; it needs Pillow.
"""
