DROP TABLE campaign_items, campaigns, profile_revisions;
