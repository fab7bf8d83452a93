"""``kvmstats top``: what VMs do, on a screen, while they come and go.

Data flows to the right: `feed` gives samples in a thread of its own; `counted` adds up what they counted; `table` makes
rows and columns of that, and `page` the lines about one VM; `model` is what the screen knows; `lines` and `screen` show
it, and are the only rooms that import textual.
"""
