"""Looking at what strategies do. Nothing here is imported by the core.

`tokenprune.analysis.overlay` draws which patches a plan keeps; it needs Pillow.
`tokenprune.analysis.consistency` tells how far two importances of visual tokens agree.
"""
