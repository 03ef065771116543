"""Scenes of several glyphs, with label maps, boxes, captions and questions."""
