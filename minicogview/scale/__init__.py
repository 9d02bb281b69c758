"""Make it fit and make it fast: everything about memory, number formats and processors that the models do not know.

The concept files at the top of the package know none of this. It is put into their models from outside.
"""
