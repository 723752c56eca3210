"""Complete Journey, a year of grocery baskets and promotions, read as an ads log.

An impression is a product promoted (display or mailer) in the store and week of a household's basket; a click is
that it was bought in the basket; a conversion, that the household bought it again within the follow-up.
"""
