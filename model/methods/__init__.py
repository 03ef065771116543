"""The methods that a config may name, and what each of them is.

A method is an nn.Module that turns a batch into features and features into a loss:

    forward(part) -> features         {name: tensor}: everything that depends on parameters, made inside the towers' own forwards
    loss(features) -> (loss, metrics) no parameters: a function of the features of the whole batch on this rank, and of the other ranks'
    views                             the names of the image views it reads (the config's `views:`)

The cut between the two is what lets accumulation keep the negatives of the whole batch (GradCache): features without a graph for all
parts, the loss and its gradient in the features once, then part after part again with a graph.  Each row of a feature belongs to one
sample, except those named in `shared`, which every part computes alike (the temperature).
To add a method: one file here, one row in METHODS.
"""
from model.methods.clip import Clip

METHODS = {"clip": Clip}
