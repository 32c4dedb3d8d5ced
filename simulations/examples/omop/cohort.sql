-- One row a visit of an adult, from the OMOP CDM 5.4. Concept ids are those of the standard vocabularies.
--
-- It runs on PostgreSQL and SQLite as it stands. On PostgreSQL let the role's search_path name the CDM's schema:
--   ALTER ROLE fedward SET search_path = cdm
--
-- What was measured is taken in one unit; rows in another unit count as not measured, so look first which ones
-- your site has. Diseases are single concepts here; with the vocabulary tables at hand, join concept_ancestor.
WITH adult AS (
    SELECT
        v.visit_occurrence_id,
        v.person_id,
        v.visit_concept_id,
        v.visit_start_date,
        v.visit_end_date,
        p.gender_concept_id,
        -- dates are text in SQLite; the first four characters are the year in either
        CAST(SUBSTR(CAST(v.visit_start_date AS VARCHAR(10)), 1, 4) AS INTEGER) - p.year_of_birth AS age
    FROM visit_occurrence AS v
    INNER JOIN person AS p ON p.person_id = v.person_id
    WHERE v.visit_concept_id IN (9201, 9202, 9203)
),

measured AS (
    SELECT
        a.visit_occurrence_id,
        m.measurement_concept_id,
        m.value_as_number,
        ROW_NUMBER() OVER (
            PARTITION BY a.visit_occurrence_id, m.measurement_concept_id
            ORDER BY m.measurement_date DESC, m.measurement_id DESC
        ) AS recency
    FROM adult AS a
    INNER JOIN measurement AS m ON m.person_id = a.person_id AND m.measurement_date <= a.visit_end_date
    WHERE
        m.value_as_number IS NOT NULL
        AND (
            (m.measurement_concept_id = 3004410 AND m.unit_concept_id = 8554)  -- HbA1c, percent
            OR (m.measurement_concept_id = 3016723 AND m.unit_concept_id = 8840)  -- creatinine, mg/dL
        )
)

SELECT
    a.person_id AS patient_id,
    a.visit_occurrence_id AS visit_id,
    a.age,
    a.gender_concept_id AS sex,
    a.visit_concept_id AS visit_kind,
    hba1c.value_as_number AS hba1c,
    creatinine.value_as_number AS creatinine,
    (
        SELECT COUNT(DISTINCT d.drug_concept_id)
        FROM drug_exposure AS d
        WHERE
            d.person_id = a.person_id
            AND d.drug_exposure_start_date BETWEEN a.visit_start_date AND a.visit_end_date
    ) AS drugs,
    (
        SELECT COUNT(*)
        FROM visit_occurrence AS before
        WHERE before.person_id = a.person_id AND before.visit_end_date < a.visit_start_date
    ) AS earlier_visits,
    CASE WHEN EXISTS (
        SELECT 1 FROM condition_occurrence AS c
        WHERE
            c.person_id = a.person_id
            AND c.condition_concept_id = 201826  -- type 2 diabetes mellitus
            AND c.condition_start_date <= a.visit_end_date
    ) THEN 1 ELSE 0 END AS diabetes,
    CASE WHEN EXISTS (
        SELECT 1 FROM condition_occurrence AS c
        WHERE
            c.person_id = a.person_id
            AND c.condition_concept_id = 316139  -- heart failure
            AND c.condition_start_date <= a.visit_end_date
    ) THEN 1 ELSE 0 END AS heart_failure,
    CASE WHEN EXISTS (
        SELECT 1 FROM visit_occurrence AS after
        WHERE
            after.person_id = a.person_id
            AND after.visit_concept_id = 9201
            AND after.visit_start_date > a.visit_end_date
    ) THEN 1 ELSE 0 END AS admitted_later
FROM adult AS a
LEFT JOIN measured AS hba1c
    ON
        hba1c.visit_occurrence_id = a.visit_occurrence_id
        AND hba1c.measurement_concept_id = 3004410
        AND hba1c.recency = 1
LEFT JOIN measured AS creatinine
    ON
        creatinine.visit_occurrence_id = a.visit_occurrence_id
        AND creatinine.measurement_concept_id = 3016723
        AND creatinine.recency = 1
WHERE a.age >= 18
ORDER BY a.visit_occurrence_id
