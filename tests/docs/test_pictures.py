"""The pictures of layouts show what `set_layout` does now."""

from helpers.layout_pictures import IMAGES, pictures


def test_the_pictures_are_those_of_the_layouts():
    drawn = pictures()
    assert {name: (IMAGES / name).read_text() for name in drawn} == drawn
