"""Many stats files, one C call a sweep: on a schedule, in the background, around a block of code."""
