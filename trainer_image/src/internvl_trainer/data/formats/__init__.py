"""Rows in the formats people have, converted to upstream's while they are read.

A file is *records* (`RowIndex`, `json_records`, `arrow`, `webdataset`: where each record starts, read on demand) of
rows of one *kind* (`turns`, `query_response`, `captions`, `vqa`: a function from a record to upstream's row).
`open_source` puts the two together. Positions of rows are the same in every format, so order, packing and resume do
not depend on it.
"""
