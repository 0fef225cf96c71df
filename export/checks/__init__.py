"""Does a graph compute what torch computes?"""
