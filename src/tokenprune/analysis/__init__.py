"""Analysis of what strategies do: pictures, overlap, curves. Nothing here is imported by the core.

`tokenprune.analysis.overlay` draws which patches a plan keeps or merges, `heat` how they score,
`sheet` puts such pictures beside each other; they need Pillow.
`tokenprune.analysis.consistency` tells how far two importances of visual tokens agree.
"""
