"""Formats that models come from and go to, a file each; portable.py is what passes between them.

    load(path, **given) -> Portable            what lies there, read lazily; ValueError where this architecture is not ours
    claims(path) -> bool                       is what lies there of this format?  It looks at names and headers alone
    save(model, folder, dtype, **options)      write it; ValueError naming the field that the format cannot express
    peer(path) -> a function                   the foreign library's own model (ImportError where it is not installed):
                                               (images (B, 3, H, W) normalised, ids (B, N) padded) -> (image, text embeddings)

To add one: a file with what of these makes sense, mostly a table of rules (rules.py), and its row in FORMATS.
"""
