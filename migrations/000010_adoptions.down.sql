ALTER TABLE apps DROP COLUMN user_id;
DROP TABLE adoptions;
