ALTER TABLE pools DROP COLUMN waiting_from, DROP COLUMN ready_from;
