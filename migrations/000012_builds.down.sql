ALTER TABLE pools DROP COLUMN importing_from;
