"""How a picture passes through an exported file: shared by those who write and run them."""

SUFFIX = ".onnx"
"""Suffix of exported files."""

NEXT = ".next"
"""Suffix of a carried array among the outputs, for the band below."""

BANDS = f"""\
A picture passes through the network in bands of rows, from top to bottom. A band may have any
number of rows; a whole picture is a band of all of its rows. The inputs for a band:

rows    its RGB pixels in [0, 1], (1, 3, rows, width)
first   the index of its first row in the picture
height  the height of the picture
others  carried from band to band: zeros for the first band, and after that the output of the
        same name with {NEXT} appended

The output "upscaled", (1, 3, scale * rows, scale * width), begins rows_late rows of the picture
above the band: drop what lies above the picture, and after the picture's last row pass rows_late
more rows, of any values. The numbers scale and rows_late are in the metadata. Values of the output
may lie slightly outside [0, 1].
"""

WHOLE = """\
The input "image" is a picture's RGB pixels in [0, 1], (1, 3, height, width). The output "upscaled",
(1, 3, scale * height, scale * width), may lie slightly outside [0, 1]. The number scale is in the
metadata.
"""
