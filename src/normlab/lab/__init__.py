"""The workbench (extra ``lab``): train one network under many methods, compare, reproduce."""
