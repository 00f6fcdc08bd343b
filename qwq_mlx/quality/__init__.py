"""What a conversion lost: it and its source on the same text, layer by layer; numbers, worst tokens, a page.

The parts are imported when they are used.
"""
