"""The browser demo: people play in a trained world model, several at once, each beside the real environment.

`protocol` is what page and server say to each other, `controls` the keys of an action space, `catalogue` where a dream
can begin, `engine` the thread that owns the device and `session` one person's state in it, `world` the model behind
them, `server` the web server and its guards, `command` the command line's entry. The page is in `page/`: plain files.
"""
